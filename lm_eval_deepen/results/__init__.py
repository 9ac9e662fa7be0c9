"""Result folders of the harness, read and paired document by document: files alone, of any model type."""
