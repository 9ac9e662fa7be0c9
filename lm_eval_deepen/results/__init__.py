"""Result folders of the harness, read and paired document by document: files alone, of any model type.

What is missing, damaged or cannot be paired is a ResultError, which names the file and the remedy.
"""
