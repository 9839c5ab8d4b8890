"""The commands of the command line, one file for each group; each only reads arguments and calls the api."""
