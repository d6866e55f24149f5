"""Archives for tests, and what runs on them: checks, the tutorial's exercises and the demonstration. See README.md."""
