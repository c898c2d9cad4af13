"""Question: does the page come together from one evaluation alone? Run configs/evaluate/tiny.py first.

python -m experiments.report --config=configs/report/tiny.py
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.title = "Baselines"
    c.introduction = ""
    c.evaluations = ("runs/evaluate/tiny",)
    c.example_model = "keywords"
    c.training = ()
    c.data = ()
    c.stages = ()
    c.quotation = ConfigDict()
    c.limits = ()
    c.own_data = ""
    c.browser = False
    c.versions = ()
    return c
