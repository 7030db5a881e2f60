"""Commands that have no house of their own: what each is told, and what it runs.

arguments    what all commands share: types of values, options that mean the same everywhere, examples in help
train, plan, grade, data, doctor, completion

`luffy eval`, `generate`, `report`, `recipes`, `data prepare` and `data gym` are beside their code. Nothing here
imports anything heavy before its command runs.
"""
