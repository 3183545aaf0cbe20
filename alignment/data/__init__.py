"""Data: reads rows of any shape into Groups, tokenises the Groups, and packs them into Batches."""
