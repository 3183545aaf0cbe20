"""Feedback: the database of answers and of what people said about them, the keys, and the audit trail."""
