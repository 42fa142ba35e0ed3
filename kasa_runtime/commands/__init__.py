"""The sub-commands of `kasa`, a module each; `kasa_runtime/cli.py` imports the one that is
called."""
