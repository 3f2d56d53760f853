-- A host leaves in good order: its lease, inventory and orders go; its log stays.
--
-- KEYS  1 hosts   2 inventory of the process   3 orders of the process   4 inbox
-- ARGV  1 process   2 note for the worker   Answer  1
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', KEYS[2], KEYS[3])
redis.call('XADD', KEYS[4], 'MAXLEN', '~', 10000, '*', 'm', ARGV[2])
return 1
