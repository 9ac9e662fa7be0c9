"""Paired statistics of two systems on the same documents: numpy alone, no model, no file.

Two runs over the same documents are compared document by document: what makes both of them right or wrong together
drops out, and only the documents on which they differ carry evidence.
"""
