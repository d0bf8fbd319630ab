"""Pretraining with language: one encoder learns every sensor by answering questions (BabelRS, CSIA with LVSA).

`recipe` says what a run is, `corpora` feeds it, `module` computes its steps, `answers` judges it, `run` puts them
together on Lightning.
"""
