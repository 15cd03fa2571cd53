-- Who may ask, and what was asked.

CREATE TABLE tokens (
    token      TEXT NOT NULL PRIMARY KEY,   -- the part of a secret that may be shown
    hash       TEXT NOT NULL,               -- of the secret, which is not stored
    name       TEXT NOT NULL,               -- whose it is; several may have one name
    project    TEXT,                        -- the only project that it reaches; absent: all
    role       TEXT NOT NULL CHECK (role IN ('viewer', 'submitter', 'admin', 'worker')),
    creator    TEXT NOT NULL,
    created_ms INTEGER NOT NULL,
    expires_ms INTEGER,
    revoked_ms INTEGER,
    used_ms    INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX tokens_by_project ON tokens (project, token);

-- Ids of workers, and whose credentials may speak for them.
CREATE TABLE worker_owners (
    worker     TEXT NOT NULL PRIMARY KEY,
    owner      TEXT NOT NULL,
    created_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX workers_by_owner ON worker_owners (owner, worker);

CREATE TABLE audit (
    seq     INTEGER PRIMARY KEY AUTOINCREMENT,
    time_ms INTEGER NOT NULL,
    caller  TEXT NOT NULL,                  -- token, subject of an identity provider, or nothing if nobody was known
    name    TEXT NOT NULL,
    peer    TEXT NOT NULL,                  -- address that the call came from
    project TEXT,                           -- the project that it was about, as far as it was understood
    rpc     TEXT NOT NULL,
    target  TEXT NOT NULL,                  -- the id that it was about
    outcome TEXT NOT NULL                   -- the code that was answered
) STRICT;
CREATE INDEX audit_by_project ON audit (project, seq);
CREATE INDEX audit_by_time ON audit (time_ms);
