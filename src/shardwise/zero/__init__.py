"""The ZeRO engine: who holds which model state, when it travels, and who steps it."""
