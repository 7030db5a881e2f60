"""`luffy data prepare`: any source of problems as a training set in LUFFY's schema, each filter counted.

    from luffy.prepare.options import Options
    from luffy.prepare.parts import prepare

    report = prepare(Options(source="openr1"), "data/openr1")

options     what is asked for, and what of it decides the bytes that come out
sieve       tokenizer, verifier and questions to leave out, as the options name them
sift        the filters, in order: rows of the source in, rows of the training set out
tally       what each filter left out
parts       so many rows of the source at a time, each part whole on disk or absent: a kill costs one part
write       parts into one parquet file and report.json
command     the command line

Importing this imports nothing, so that `luffy --help` answers at once.
"""
