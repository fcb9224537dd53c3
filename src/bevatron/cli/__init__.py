"""The verbs. Each one parses its options, imports what it needs, calls one function and prints."""
