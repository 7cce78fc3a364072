"""Benchmarks asked of a model with EleutherAI's harness (lm-eval).

evaluating      suites asked of a model, task by task
harness         the only importer of lm_eval: definitions of tasks, requests, metrics
benchmark_rows  local benchmark files as the rows that the harness reads from the Hub
journal         answered requests, so that an evaluation goes on where it was interrupted
compare         two models, or a model and the reference card, with what is beyond noise
decontaminated  whether the training mixture was rid of a benchmark
"""
