"""The verbs that work for longer than a minute: each is a page that reads from top to bottom."""
