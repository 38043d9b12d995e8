"""What happened: immutable facts, the requests that cause them, and their bytes.

The lowest layer of the package: it imports nothing of ``space`` but the errors.
"""
