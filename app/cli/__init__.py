"""The command ``depthscope``: one file a command, typer for parsing, help and completion."""
