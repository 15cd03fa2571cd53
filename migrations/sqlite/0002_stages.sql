-- Jobs that are stages of another job of their project.

ALTER TABLE jobs ADD COLUMN parent TEXT;    -- the job that it is a stage of, if it is one
ALTER TABLE jobs ADD COLUMN stage TEXT;     -- its name there
CREATE INDEX jobs_by_parent ON jobs (project, parent, job) WHERE parent IS NOT NULL;
