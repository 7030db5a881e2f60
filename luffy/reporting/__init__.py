"""`luffy report`: what runs did, on one page that needs no network.

runs    a run folder, read        charts  which numbers are drawn        rules   what is wrong with a run
page    the HTML                  command `luffy report`, `--watch`
"""
