"""``optkit recipe``: list, show and check recipes."""

from __future__ import annotations

from typing import Annotated

import typer

from optkit.cli import options
from optkit.cli.terminal import Terminal, command

app = typer.Typer(rich_markup_mode=None)

_Name = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, or a .yaml file.", show_default=False),
]


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """List, show and check recipes."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("list")
@command
def list_(terminal: Terminal, json: options.Json = False) -> int:
    """List the recipes that come with optkit."""
    from optkit.cli.render import table
    from optkit.recipe import Recipe, shipped

    recipes = {name: Recipe.load(name) for name in shipped()}
    if json:
        terminal.json([{"name": name, "description": r.description} for name, r in recipes.items()])
    else:
        terminal.result(
            table(("Recipe", "What it does"), [(name, r.description) for name, r in recipes.items()])
        )
    return 0


@app.command("show")
@command
def show(terminal: Terminal, recipe: _Name, sets: options.Set = None, json: options.Json = False) -> int:
    """Print a recipe with everything that it imports and every default written out."""
    from optkit.recipe import Recipe

    found = Recipe.load(recipe, sets or ())
    if json:
        terminal.json(found.dump())
    else:
        terminal.result(found.yaml().rstrip())
    return 0


@app.command("check")
@command
def check(terminal: Terminal, recipe: _Name, sets: options.Set = None, json: options.Json = False) -> int:
    """Check a recipe against its schema; exit code 2 and the place where it is wrong."""
    from optkit.backends import BACKENDS
    from optkit.recipe import Recipe
    from optkit.targets import target

    found = Recipe.load(recipe, sets or ())
    for name in found.candidates:
        Recipe.load(name)
    if found.target is not None:
        target(found.target)
    if found.backend is not None:
        _ = BACKENDS[found.backend]
    if json:
        terminal.json({"recipe": recipe, "valid": True, "digest": found.digest})
    else:
        steps = [p.name for p in found.passes]
        steps += [f"one of {', '.join(found.candidates)}"] if found.candidates else []
        terminal.result(f"{recipe}: valid: {', '.join(steps) or 'nothing to do'}")
    return 0


@app.command("schema")
@command
def schema(terminal: Terminal, json: options.Json = True) -> int:
    """Print the JSON Schema of recipe files, for editors."""
    from optkit.recipe import schema as recipe_schema

    terminal.json(recipe_schema())
    return 0
