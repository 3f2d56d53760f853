-- Give the lease of a partition back. Does nothing when it is no longer held.
--
-- KEYS  1 lease   ARGV  1 "holder epoch"   Answer  1 released, 0 not held
if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end
return 0
