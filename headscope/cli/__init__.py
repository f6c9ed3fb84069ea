"""The command line: one file per command, thin calls into the library, nothing computed here."""
