"""Scores on benchmarks: which suites there are, what is kept of a result, and how it gets into a model card. No torch.

suites   the suites and their tasks
results  the file of a suite's results, averages, tables
card     the section of a model card, `model-index` and `.eval_results/`
"""
