"""How captions are read: tokens, and text encoders."""
