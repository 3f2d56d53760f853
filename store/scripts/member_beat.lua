-- A worker says that it is there; those not heard of for their time are forgotten.
--
-- KEYS  1 members (sorted set: worker -> when it counts as gone, ms)
-- ARGV  1 worker   2 time to live in ms
-- Answer  the workers that are there
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', now)
return redis.call('ZRANGE', KEYS[1], 0, -1)
