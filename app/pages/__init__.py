"""The pages, one a file: `layout(...)` is given what the address holds; `register(app)` installs the callbacks of a page that has any."""
