"""What every other package uses: errors, checks of arguments, files, output of commands."""
