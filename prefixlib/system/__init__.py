"""What every part uses: errors, files, processes, places. Standard library only."""
