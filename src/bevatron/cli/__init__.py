"""The verbs: each parses, calls one function and prints. Nothing heavy is imported before that."""
