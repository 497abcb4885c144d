"""The command line's root, and the one place where the library's errors become words."""

from __future__ import annotations

import os
import sys

import click

from alexprep.cli.bench import bench
from alexprep.cli.demo import demo
from alexprep.cli.evaluate import evaluate
from alexprep.cli.options import INTERRUPTED
from alexprep.cli.pca_stats import pca_stats
from alexprep.cli.recipes import recipes
from alexprep.cli.shard import shard
from alexprep.cli.train import train
from alexprep.cli.tune import tune
from alexprep.cli.verify import verify
from alexprep.shards.errors import TRACEBACK, AlexprepError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="alexprep")
def cli() -> None:
    """Raw ImageNet in, trained AlexNet out.

    \b
    alexprep shard /imagenet    resized webdataset shards in ./alexprep-data
    alexprep verify             every byte of them checked
    alexprep pca-stats          the mean image and the RGB covariance's eigenpairs
    alexprep tune               how this machine loads fastest; train uses it
    alexprep train              DALI pipelines and a torch training loop; results in ./runs
    """


for command in (shard, verify, pca_stats, tune, recipes, train, evaluate, bench, demo):
    cli.add_command(command)


def main() -> None:
    """Runs the command line: an error is a line on stderr and exit status 1, never a traceback."""
    try:
        status = cli.main(standalone_mode=False)
    except AlexprepError as error:
        click.echo(f"Error: {error}", err=True)
        status = 1
    except click.ClickException as error:
        error.show()
        status = error.exit_code
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        click.echo(f"Error: {where}{error.strerror or error}", err=True)
        status = 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("Interrupted. Finished work is kept: run the same command again to go on.", err=True)
        status = INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        words = f"{type(error).__name__}: {error}".splitlines()[0]
        click.echo(f"Error: {words}\nThis may be a bug in alexprep; {TRACEBACK}=1 shows where it happened.", err=True)
        status = 1
    sys.exit(status if isinstance(status, int) else 0)
