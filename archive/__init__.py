"""The pipeline from an exported model to a verified archive."""
