"""What every shape of rows is read with: a row's cells, its fields, its messages, and the group made of them.

Nothing here knows which shapes there are; `alignment.data.shapes` does.
"""
