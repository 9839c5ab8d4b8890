"""The command line as a script that launchers start by its path."""
