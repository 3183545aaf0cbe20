"""Data: rows of any shape become Groups, Groups become token ids, token ids become packed Batches."""
