"""Where weights come from: files of every kind, packed or not."""
