"""The specification: a test's name and first line state the behaviour."""
