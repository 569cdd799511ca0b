-- Who the people behind actors are, beside the log: events hold a person's name sealed, and only the key here opens it.
-- Deleting a row forgets the person. The gateway alone may look here; the keys are wrapped under a file that it has.

create table people.keys (
    person text primary key check (person ~ '^[0-9a-f]{32}$'),
    digest bytea not null unique, -- of the name, keyed: finds a person by name, and tells nothing without the file
    key bytea not null,
    sealed text not null,
    since timestamptz not null default now()
);

-- The actors that a person was: one for each role and organization that its tokens have had.
create table people.actors (
    actor text primary key,
    person text not null references people.keys on delete cascade
);
create index actors_person on people.actors (person);

-- What tells the file that the keys are wrapped under from any other.
create table people.key_file (
    id boolean primary key default true check (id),
    proof bytea not null
);
