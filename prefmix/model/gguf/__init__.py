"""A model as one GGUF file, for llama.cpp and what is built on it.

exporting   the export from end to end, and what is corrected in it
converter   the kept converter, in a folder of its own
file        GGUF read and patched
"""
