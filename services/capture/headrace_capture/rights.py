"""What the role of capture needs: to replicate, to read the tables, and to see every row of them (S14).

Only what is missing is granted, and remembered, so that teardown takes away what setup gave and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

from psycopg import sql

from headrace.errors import Misconfigured
from headrace_capture.catalog import Connection, Table
from headrace_capture.memory import Grant


@dataclass(frozen=True, slots=True)
class Role:
    """A role that capture and verify connect as."""

    name: str
    replicates: bool
    sees_all: bool


def role_of(connection: Connection, name: str) -> Role:
    """Return what a role may do of itself.

    Raises:
        Misconfigured: `no-such-role`.
    """
    query = "SELECT rolname, rolsuper OR rolreplication, rolsuper OR rolbypassrls FROM pg_roles WHERE rolname = %s"
    row = connection.execute(query, [name]).fetchone()
    if row is None:
        said = f"There is no role {name} in the source."
        raise Misconfigured(
            "no-such-role", said, f"Run: CREATE ROLE {sql.Identifier(name).as_string()} LOGIN PASSWORD '…'"
        )
    return Role(*row)


def given_last(connection: Connection, grants: list[Grant]) -> str:
    """Return the role that was given rights last, of those that there are; "" for none."""
    roles = {role for (role,) in connection.execute("SELECT rolname FROM pg_roles")}
    return next((grant.role for grant in reversed(grants) if grant.role in roles), "")


def missing(connection: Connection, tables: list[Table], role: Role) -> list[Grant]:
    """Return the rights that `role` lacks to capture `tables`.

    The initial snapshot reads each partition by its own name; rows that are read again are named by their keys, as values of their types.
    """
    oids = {oid for table in tables for oid in (table.oid, *(leaf.oid for leaf in table.leaves))}
    keys = {column.oid for table in tables for column in table.columns if column.name in table.key}
    types = connection.execute(_TYPES_LACK, {"role": role.name, "oids": list(keys)}).fetchall()
    lacks = connection.execute(_LACKS, {"role": role.name, "oids": list(oids)}).fetchall()
    found = [] if role.replicates else [Grant(role.name, "REPLICATION")]
    if not role.sees_all and any(hidden for *_, hidden in lacks):
        found.append(Grant(role.name, "BYPASSRLS"))
    schemas = {row[0] for row in lacks if row[2]}.union(schema for (schema,) in types)
    found += [Grant(role.name, "USAGE", schema) for schema in sorted(schemas)]
    return found + [Grant(role.name, "SELECT", row[0], row[1]) for row in lacks if row[3]]


def give(grant: Grant) -> sql.Composed:
    """Return the statement that gives a right."""
    role = sql.Identifier(grant.role)
    if not grant.schema:
        return sql.SQL("ALTER ROLE {} {}").format(role, sql.SQL(_ATTRIBUTES[grant.right][0]))
    return sql.SQL("GRANT {} TO {}").format(_object(grant), role)


def take(grant: Grant) -> sql.Composed:
    """Return the statement that takes it back."""
    role = sql.Identifier(grant.role)
    if not grant.schema:
        return sql.SQL("ALTER ROLE {} {}").format(role, sql.SQL(_ATTRIBUTES[grant.right][1]))
    return sql.SQL("REVOKE {} FROM {}").format(_object(grant), role)


def _object(grant: Grant) -> sql.Composed:
    if grant.right == "USAGE":
        return sql.SQL("USAGE ON SCHEMA {}").format(sql.Identifier(grant.schema))
    return sql.SQL("SELECT ON {}").format(sql.Identifier(grant.schema, grant.name))


_ATTRIBUTES = {"REPLICATION": ("REPLICATION", "NOREPLICATION"), "BYPASSRLS": ("BYPASSRLS", "NOBYPASSRLS")}

# Row security hides rows from everybody but a superuser, BYPASSRLS, and the owner unless it is forced.
_LACKS = """
SELECT n.nspname, c.relname, NOT has_schema_privilege(%(role)s, n.oid, 'USAGE'), NOT has_table_privilege(%(role)s, c.oid, 'SELECT'),
       c.relrowsecurity AND (c.relforcerowsecurity OR NOT pg_has_role(%(role)s, c.relowner, 'USAGE'))
FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE c.oid = ANY(%(oids)s) ORDER BY 1, 2
"""

# Also below domains: there the operators are.
_TYPES_LACK = """
WITH RECURSIVE type(oid) AS (
  SELECT unnest(%(oids)s::oid[]) UNION SELECT t.typbasetype FROM type y JOIN pg_type t ON t.oid = y.oid WHERE t.typtype = 'd'
)
SELECT DISTINCT n.nspname FROM type y JOIN pg_type t ON t.oid = y.oid JOIN pg_namespace n ON n.oid = t.typnamespace
WHERE NOT has_schema_privilege(%(role)s, n.oid, 'USAGE')
"""
