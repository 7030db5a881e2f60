"""One file a schema, one function in each: a row becomes a problem. `luffy.data.schemas` is the table of them."""
