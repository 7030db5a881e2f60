"""Commands that have no house of their own: what each is told, and what it runs.

arguments    what all commands share: types of values, options that mean the same everywhere, examples in help
train, plan, generate, grade, recipes, data (with gym), doctor, completion

`luffy eval`, `report` and `data prepare` are beside their code. What a command needs beyond the standard library is
imported when it runs (a test holds it), so that `luffy --help` answers at once.
"""
