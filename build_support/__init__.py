"""What setup.py and the tests know about building the extension. Imports nothing but the standard library."""
