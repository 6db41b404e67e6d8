-- Two databases, each with a role of its own, so that a job's SQL cannot reach Headway's tables.
-- Runs once, on an empty data folder, as the superuser.
\set ON_ERROR_STOP on
\getenv database_password DATABASE_PASSWORD
\getenv source_password SOURCE_PASSWORD

CREATE ROLE headway LOGIN PASSWORD :'database_password';
CREATE DATABASE headway OWNER headway;
REVOKE ALL ON DATABASE headway FROM PUBLIC;

CREATE ROLE headway_source LOGIN PASSWORD :'source_password';
CREATE DATABASE headway_source OWNER headway_source;
REVOKE ALL ON DATABASE headway_source FROM PUBLIC;

REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;
