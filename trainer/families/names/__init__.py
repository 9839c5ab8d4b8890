"""The names of weights in single files and in our modules, both ways."""
