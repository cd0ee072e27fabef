"""The server around the engine: models and their versions, operations, safety."""
