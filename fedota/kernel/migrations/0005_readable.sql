-- Rows that services would read and an auditor of positions 1, 2, 3, … would pass by; years whose text hides the era.
alter table fedota.events
    add constraint events_position check (position > 0) not valid,
    add constraint events_time check (time >= '2000-01-01T00:00:00Z') not valid;
alter table fedota.events validate constraint events_position;
alter table fedota.events validate constraint events_time;
