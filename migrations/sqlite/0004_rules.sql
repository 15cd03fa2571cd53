-- What people have said other than of jobs (what projects may have, workers that get nothing new), and limits of time that jobs set
-- themselves.

CREATE TABLE rules (
    kind  TEXT NOT NULL,   -- `policy` or `cordon`
    name  TEXT NOT NULL,   -- the project or the worker
    value TEXT NOT NULL,   -- JSON
    PRIMARY KEY (kind, name)
) STRICT, WITHOUT ROWID;

ALTER TABLE jobs ADD COLUMN run_limit_ms INTEGER;   -- how long it may run, all attempts together
ALTER TABLE jobs ADD COLUMN deadline_ms INTEGER;    -- by when it is to be done
CREATE INDEX jobs_limited ON jobs (project, job)
    WHERE finished_ms IS NULL AND (run_limit_ms IS NOT NULL OR deadline_ms IS NOT NULL);
