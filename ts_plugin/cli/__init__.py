"""The command ts-cores: its arguments, and what each command prints."""
