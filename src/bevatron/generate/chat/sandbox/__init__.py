"""Chat templates, evaluated without being trusted.

jinja2 parses a template; its nodes are evaluated here, one by one, on plain data. Nothing is
compiled to Python and no attribute of a Python object is ever looked up, so there is no way from a
template to the interpreter around it; and every step and every character is paid for out of a
budget before it is spent, so that no template can hang or fill the memory. jinja2's own sandbox
gives neither: its templates become Python code, and one C call in them (`'a' * 10**10`, a
comparison of shared lists nested forty deep) cannot be stopped.
"""
