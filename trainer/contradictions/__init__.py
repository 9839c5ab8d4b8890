"""Settings that contradict each other, found before anything is opened: one file a group of settings."""
