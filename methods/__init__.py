"""One file for each objective or server's rule; a row of `options.METHODS` names its objective as FILE:CLASS."""
