-- Control-plane state. `project` is the first part of every key; times are UTC milliseconds given by the caller;
-- documents are JSON text; digests are written `blake3:<64 hex>`.

CREATE TABLE jobs (
    project     TEXT NOT NULL,
    job         TEXT NOT NULL,
    version     INTEGER NOT NULL,           -- grows by one with each change: what a change is compared with
    name        TEXT NOT NULL,
    kind        TEXT NOT NULL,
    spec        TEXT NOT NULL,              -- as submitted
    resolved    TEXT NOT NULL,              -- references replaced by digests
    state       TEXT NOT NULL CHECK (state IN ('waiting', 'queued', 'starting', 'running', 'stopping', 'backoff',
                                               'paused', 'succeeded', 'failed', 'cancelled')),
    stop        TEXT CHECK (stop IN ('cancel', 'pause', 'preempt')),
    reason      TEXT NOT NULL,              -- from the scheduling core's closed list
    message     TEXT NOT NULL,
    epoch       INTEGER NOT NULL CHECK (epoch >= 0),
    attempts    INTEGER NOT NULL CHECK (attempts >= 0),
    priority    INTEGER NOT NULL,
    core        TEXT NOT NULL,              -- what the scheduling core needs to take the job up again
    metrics     INTEGER NOT NULL DEFAULT 0, -- number of the last metric point
    progress    TEXT,
    outputs     TEXT NOT NULL DEFAULT '[]',
    failure     TEXT,
    retry_of    TEXT,
    created_ms  INTEGER NOT NULL,
    updated_ms  INTEGER NOT NULL,
    started_ms  INTEGER,
    finished_ms INTEGER,
    PRIMARY KEY (project, job),
    CHECK ((state = 'stopping') = (stop IS NOT NULL)),
    CHECK ((state IN ('succeeded', 'failed', 'cancelled')) = (finished_ms IS NOT NULL))
) STRICT;
CREATE INDEX jobs_unfinished ON jobs (project, job) WHERE finished_ms IS NULL;
CREATE INDEX jobs_by_state ON jobs (project, state, job);

CREATE TABLE job_labels (
    project TEXT NOT NULL,
    job     TEXT NOT NULL,
    key     TEXT NOT NULL,
    value   TEXT NOT NULL,
    PRIMARY KEY (project, job, key),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
) STRICT, WITHOUT ROWID;
CREATE INDEX job_labels_by_value ON job_labels (project, key, value, job);

-- Artifacts that a job was created with: they cannot be deleted until the job has ended.
CREATE TABLE job_inputs (
    project TEXT NOT NULL,
    job     TEXT NOT NULL,
    role    TEXT NOT NULL,
    digest  TEXT NOT NULL,
    PRIMARY KEY (project, job, role, digest),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
) STRICT, WITHOUT ROWID;
CREATE INDEX job_inputs_by_digest ON job_inputs (project, digest);

CREATE TABLE attempts (
    project    TEXT NOT NULL,
    job        TEXT NOT NULL,
    epoch      INTEGER NOT NULL,
    cohort     INTEGER NOT NULL,
    workers    TEXT NOT NULL,               -- JSON list of worker ids, by rank
    outcome    TEXT,                        -- absent while the attempt may be alive
    message    TEXT NOT NULL,
    reported   INTEGER NOT NULL,           -- number of the last report that was recorded
    started_ms INTEGER NOT NULL,
    ended_ms   INTEGER,
    PRIMARY KEY (project, job, epoch),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
) STRICT, WITHOUT ROWID;

CREATE TABLE cohorts (
    cohort     INTEGER NOT NULL PRIMARY KEY,
    project    TEXT NOT NULL,
    core       TEXT NOT NULL,               -- members, leases and workers as the scheduling core wants them back
    created_ms INTEGER NOT NULL,
    ended_ms   INTEGER
) STRICT;
CREATE INDEX cohorts_live ON cohorts (cohort) WHERE ended_ms IS NULL;

CREATE TABLE event_heads (
    project TEXT NOT NULL PRIMARY KEY,
    seq     INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
    project TEXT NOT NULL,
    seq     INTEGER NOT NULL,
    job     TEXT,
    epoch   INTEGER,
    kind    TEXT NOT NULL,
    data    TEXT NOT NULL,
    time_ms INTEGER NOT NULL,
    PRIMARY KEY (project, seq)
) STRICT, WITHOUT ROWID;
CREATE INDEX events_by_job ON events (project, job, seq) WHERE job IS NOT NULL;

CREATE TABLE requests (
    project     TEXT NOT NULL,
    request     TEXT NOT NULL,
    body_digest TEXT NOT NULL,
    answer      TEXT NOT NULL,
    created_ms  INTEGER NOT NULL,
    PRIMARY KEY (project, request)
) STRICT, WITHOUT ROWID;

CREATE TABLE metrics (
    project TEXT NOT NULL,
    job     TEXT NOT NULL,
    seq     INTEGER NOT NULL,               -- in the order of arrival, from 1, per job
    name    TEXT NOT NULL,
    step    INTEGER NOT NULL,
    epoch   INTEGER NOT NULL,
    value   REAL,                           -- NULL is not-a-number, which SQLite cannot hold
    tokens  INTEGER NOT NULL,
    time_ms INTEGER NOT NULL,
    PRIMARY KEY (project, job, seq),
    UNIQUE (project, job, name, step, epoch),
    FOREIGN KEY (project, job) REFERENCES jobs (project, job)
) STRICT, WITHOUT ROWID;
CREATE INDEX metrics_by_step ON metrics (project, job, step);

CREATE TABLE artifacts (
    project    TEXT NOT NULL,
    digest     TEXT NOT NULL,
    kind       TEXT NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    created_ms INTEGER NOT NULL,
    PRIMARY KEY (project, digest)
) STRICT;
CREATE INDEX artifacts_by_time ON artifacts (project, created_ms, digest);

CREATE TABLE artifact_files (
    project    TEXT NOT NULL,
    digest     TEXT NOT NULL,
    path       TEXT NOT NULL,
    blob       TEXT NOT NULL,
    size_bytes INTEGER NOT NULL CHECK (size_bytes >= 0),
    PRIMARY KEY (project, digest, path),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX artifact_files_by_blob ON artifact_files (project, blob);

-- Who made an artifact, when and how fast: facts of a run, kept out of the digest. Two jobs may make the same bytes.
CREATE TABLE artifact_commits (
    project    TEXT NOT NULL,
    digest     TEXT NOT NULL,
    job        TEXT NOT NULL,
    epoch      INTEGER NOT NULL,
    record     TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    PRIMARY KEY (project, digest, job, epoch),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX artifact_commits_by_job ON artifact_commits (project, job, digest);

-- An edge outlives the artifact it points at: what was made from it still says so.
CREATE TABLE lineage (
    project TEXT NOT NULL,
    digest  TEXT NOT NULL,
    role    TEXT NOT NULL,
    cause   TEXT NOT NULL,
    PRIMARY KEY (project, digest, role, cause),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX lineage_by_cause ON lineage (project, cause, digest);

CREATE TABLE tags (
    project  TEXT NOT NULL,
    tag      TEXT NOT NULL,
    digest   TEXT NOT NULL,
    job      TEXT,                          -- the job that moved it, if a job did
    moved_ms INTEGER NOT NULL,
    PRIMARY KEY (project, tag),
    FOREIGN KEY (project, digest) REFERENCES artifacts (project, digest)
) STRICT, WITHOUT ROWID;
CREATE INDEX tags_by_digest ON tags (project, digest);

CREATE TABLE counters (
    name  TEXT NOT NULL PRIMARY KEY,
    value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
